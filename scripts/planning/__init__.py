"""Parts of `make plan`."""
