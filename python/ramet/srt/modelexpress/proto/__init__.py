"""The wire messages of ModelExpress and of gRPC's health protocol, in descriptor pools of their own."""
