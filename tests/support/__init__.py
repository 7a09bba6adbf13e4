"""What tests share: tiny models, servers as processes, stand-ins for hardware."""
