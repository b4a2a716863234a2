"""Read reports: labels with the sentences that state them, findings, and prompts mined from reports.

A reader takes the text of a report and decides for each label whether it is present, absent, uncertain or not mentioned
(``reader.py``). There are readers by rules (``rules.py``), by a classifier and by a language model. The code names no
label: the phrases for labels are in ``configs/terms``, those for negation in ``configs/languages``.
"""
