"""What surrounds the endpoints: admission, time limits, middleware, problem documents."""
