"""The parts of `src.report`: runs in, numbers, tables, figures, page out."""
