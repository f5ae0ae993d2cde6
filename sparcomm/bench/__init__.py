"""Measurements that anyone can repeat: `sparcomm bench NAME`."""
