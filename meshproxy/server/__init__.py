"""aiohttp's server side: handlers, the error envelope, admin pages, workers."""
