"""What runs the steps of a generation: `smollm2.engine.select` chooses, the other files are the engines and
their parts.
"""
