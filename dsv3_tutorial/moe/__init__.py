"""DeepSeekMoE: which experts a token goes to, how they are kept busy, and how they are computed."""
