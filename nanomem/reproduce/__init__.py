"""The paper's claims, small: `python -m nanomem.reproduce` trains the models of a table and writes it."""
