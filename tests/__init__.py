"""Facts about the project, each with an oracle of its own."""
