"""An edge proxy for LLM traffic: keys, rate limits, prepaid credit, and streams relayed untouched."""
