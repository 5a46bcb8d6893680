"""Pages to look at: self-contained HTML of a run, its data, its traces, a comparison."""
