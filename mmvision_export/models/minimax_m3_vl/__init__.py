"""The vision tower of MiniMax-M3-VL."""
