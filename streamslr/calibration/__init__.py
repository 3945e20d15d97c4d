"""Text -> token windows -> hidden states -> Gram matrices."""
