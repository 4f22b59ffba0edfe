"""What stands around the endpoints: bounds, time limits, middleware, problem documents."""
