"""On disk and on the Hub: folders written whole or not at all."""
