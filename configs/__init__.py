"""Declarations without torch: the contract between the stages, run schemas and YAML presets."""
