"""Where a model sees a finding: maps in the scan's own space, the regions in them, and pictures through their peaks."""
