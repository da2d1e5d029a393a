"""Texts, images and base models: pinned packages, folders, the Hub."""
