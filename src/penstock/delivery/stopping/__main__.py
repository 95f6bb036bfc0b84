"""A process for functions that can be imported."""

from penstock.delivery.stopping.child import main

main()
