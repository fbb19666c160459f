print("第一行")
