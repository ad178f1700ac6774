"""From Hugging Face files to a model that can be served right, or a refusal that says why not."""
