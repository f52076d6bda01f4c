"""An SGLang platform in pure PyTorch, for machines without an accelerator."""
