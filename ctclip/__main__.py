from ctclip.cli import command

command()
