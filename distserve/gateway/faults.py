"""What a client is told when the fault is ours and nothing else can be said."""

BAD_FAULT = "Something broke inside the gateway; its log has the details under this request's id."
