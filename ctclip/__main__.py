from ctclip.cli import main

main()
