from .plot import main

main()
