"""Is an exported graph the same function as the encoder, and where is it not?"""
