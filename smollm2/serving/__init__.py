"""A model as a server: requests that share one batch, and OpenAI's interface to them."""
