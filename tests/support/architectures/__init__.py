"""A hundred architectures of transformers as tiny random models, and what the harness does with each.

`table.py` holds their configs and what is expected of them, `build.py` makes the models, `outcome.py` tries one, and
`python -m tests.support.architectures --write docs/models.md` writes the table for readers.
"""
