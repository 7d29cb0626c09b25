"""Values that look right: by a string's format, or by a word in a property's name. The first hint that fits wins."""

FORMATS = {
    "date": "2025-03-14",
    "date-time": "2025-03-14T15:09:26Z",
    "time": "15:09:26Z",
    "duration": "P3D",
    "email": "ada@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "9b2f7c1e-4d3a-4b6e-8f10-2a5c6d7e8f90",
}
NUMBERS = {
    "year": 2025,
    "age": 37,
    "price": 19,
    "temp": 21,
    "count": 3,
    "limit": 10,
    "lat": 48,
    "lon": 2,
    "percent": 50,
}
STRINGS = {
    "city": ("Paris", "Lisbon", "Kyoto"),
    "location": ("Paris, France", "Lisbon, Portugal", "Kyoto, Japan"),
    "country": ("France", "Portugal", "Japan"),
    "unit": ("celsius",),
    "email": ("ada@example.com",),
    "date": ("2025-03-14",),
    "day": ("Friday",),
    "time": ("15:09",),
    "url": ("https://example.com/",),
    "currency": ("EUR", "USD"),
    "language": ("en", "fr"),
    "color": ("teal", "amber"),
    "query": ("how tides work", "the nine bridges"),
    "title": ("A Quiet Harbour", "Nine Bridges"),
    "name": ("Ada Lovelace", "Grace Hopper"),
    "id": ("a1b2c3",),
}
ANYTHING = ("a pear tree", "the old harbour", "a letter", "nine bridges")
