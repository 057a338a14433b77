"""DeepSeek-V3 in miniature, built to teach hardware-aware co-design. Importing this imports nothing."""
