"""Bytes that last: durable files, safetensors, the layout of packed linears, the compressed folder."""
