from infra.layers.cli import main

main()
