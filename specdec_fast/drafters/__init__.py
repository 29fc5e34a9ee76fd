"""Drafters: each proposes draft tokens in target ids and says by what law it drew them."""
