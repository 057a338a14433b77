"""DeepSeek-V3 in miniature, built to teach hardware-aware co-design. It imports nothing itself."""
