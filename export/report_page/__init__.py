"""report.html, the page of every version: its numbers, its charts, and how it is put together."""
