"""ModelExpress: instances find the seed that serves what they need. The package itself imports nothing."""
