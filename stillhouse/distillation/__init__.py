"""Distilling one or many teachers into one student."""
