"""S, U, V -> bytes that last: packing by pattern, and durable safetensors shards."""
