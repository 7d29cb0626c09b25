"""The pipeline: authenticate, resolve, admit, attempt, relay, settle. Knows no aiohttp and no redis."""
