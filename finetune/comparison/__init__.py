"""方法的比较：scripts/compare_methods.py 是它的门。"""
