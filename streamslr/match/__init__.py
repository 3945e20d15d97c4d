"""A whole block refined against its dense self, supports fixed."""
