"""What was trained, for others: adapter, merged model, or parts, each with its model card."""
