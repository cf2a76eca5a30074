"""The paper's tables: runs, jobs, reports."""
