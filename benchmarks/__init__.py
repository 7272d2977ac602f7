"""How fast, how exact and how large what the export writes is, beside other ways to run a KAN."""
