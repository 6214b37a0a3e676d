"""The federated program: one ServerApp, one ClientApp, and the engines that run them."""
