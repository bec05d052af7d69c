"""From options to a plan: schedules, token scores, checks. Imports runtime and below; not capture or analysis."""
