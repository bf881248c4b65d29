"""The study around the method: steps, runs, tables, figures, report."""
