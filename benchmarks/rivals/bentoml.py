"""BentoML: uvicorn with one worker."""
