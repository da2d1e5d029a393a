"""Parts of methods that two papers share."""
