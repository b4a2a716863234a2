"""Reports read: labels with the sentences that state them, findings, prompts in the reports' own words.

A reader takes the text of a report and says of each label whether it is present, absent, uncertain or not mentioned
(``reader.py``). Ours read by rules (``rules.py``), by a classifier and by a language model. No label's name is in the
code: what a label is called stands in ``configs/terms``, what negates in ``configs/languages``.
"""
