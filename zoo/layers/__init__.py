"""nn.Modules that hold packed weights, one file a weight format."""
